"""`python -m mpcserve` is `mpcserve`."""

from mpcserve.cli import main

main()
