"""`python -m vlm`: the same as `vlm`."""

from vlm.cli import main

main()
