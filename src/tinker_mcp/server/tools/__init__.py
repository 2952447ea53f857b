"""The tools, one module a subject. Each parses, calls one function below, and shapes a reply."""
