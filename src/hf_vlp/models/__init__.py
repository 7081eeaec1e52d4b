"""The four papers as Hugging Face models: flat and closed, so that a saved folder can carry its own code."""
