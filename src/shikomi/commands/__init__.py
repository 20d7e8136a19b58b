"""The subcommands of `shikomi`, by what they are about. Importing them never imports torch."""
