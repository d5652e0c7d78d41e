"""Two small pretrained models, for tests and measurements on weights that nobody made for this package."""
