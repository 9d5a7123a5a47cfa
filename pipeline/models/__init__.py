"""The Inception family from block tables, its weights, and the resolving of a model spec."""
