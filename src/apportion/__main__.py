"""``python -m apportion`` is the ``apportion`` command; ``torchrun -m apportion`` needs this form."""

from apportion.cli import main

if __name__ == "__main__":
    main()
