"""`python -m latentddae` is the `latentddae` command."""

from latentddae.cli import main

main()
