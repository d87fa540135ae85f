"""``python -m fl_ray``: the command line."""

from fl_ray.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
