"""`python -m ghostvis_mega`, also installed as `ghostvis`."""

from ghostvis_mega.cli.main import main

if __name__ == "__main__":
    main()
