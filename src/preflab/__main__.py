"""`python -m preflab` is the command `preflab`."""

from .cli import main

if __name__ == "__main__":
    main()
