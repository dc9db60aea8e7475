"""The door of the command `python -m helpers.predict MODEL FILE --out OUT`, which `helpers.lab.predict` holds (chapter 11)."""

from helpers.lab.predict import main

if __name__ == "__main__":
    main()
