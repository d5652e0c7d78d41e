"""Command line, inputs, kept results and tables that the papers' scripts share."""
