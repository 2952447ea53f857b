"""From what was asked to a checked RunSpec with its cost: all that can fail for free fails here."""
