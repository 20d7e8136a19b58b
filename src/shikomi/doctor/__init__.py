"""Is this machine ready? Each check gives a line OK, WARN or FAIL, with what puts it right."""
