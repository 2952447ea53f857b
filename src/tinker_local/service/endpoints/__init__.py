"""The server half of the SDK's `tinker/resources`: one module for each of its subjects."""
