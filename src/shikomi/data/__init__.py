"""Sources, row formats, chat templates and masks, checks, token cache and packing."""
