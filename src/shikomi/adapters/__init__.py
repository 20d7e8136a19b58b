"""Adapters: what is trained beside or inside a frozen base. One file per adapter."""
