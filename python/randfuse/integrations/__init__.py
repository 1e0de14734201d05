"""Adapters to other packages, imported lazily."""
