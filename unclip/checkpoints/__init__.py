"""Loading and saving of models in our own and foreign formats; see README.md."""
