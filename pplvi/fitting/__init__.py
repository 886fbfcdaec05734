"""One call from a model to a posterior. Imports ``training`` and ``guides`` and what stands below."""
