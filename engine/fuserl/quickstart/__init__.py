"""The whole pipeline on a corpus the project makes itself."""
