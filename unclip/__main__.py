"""`python -m unclip VERB …` is `unclip VERB …`."""

from unclip import cli

cli.main()
