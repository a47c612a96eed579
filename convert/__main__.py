"""``python -m convert``: the same as ``octavo``."""

from convert.command import main

if __name__ == "__main__":
    main()
