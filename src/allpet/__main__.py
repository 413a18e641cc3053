"""``python -m allpet`` is ``allpet``."""

from allpet.cli import main

if __name__ == "__main__":
    main()
