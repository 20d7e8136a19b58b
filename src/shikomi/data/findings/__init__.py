"""What can be wrong with rows that can be read: one file for each family of checks, and the codes of all findings."""
