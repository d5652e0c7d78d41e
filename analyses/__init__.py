"""Scripts that make the tables and figures of the papers, and the models that ship."""
