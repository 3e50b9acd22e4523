"""`python -m agentsd`: the command line."""

from agentsd.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
