"""Claims about the algorithms as objects that a computer checks and tries to break."""
