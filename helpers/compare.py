"""The door of the command `python -m helpers.compare FILE …`, which `helpers.lab.compare` holds (chapter 11)."""

from helpers.lab.compare import main

if __name__ == "__main__":
    main()
