"""From a source checkpoint to an artifact: recipes, scales, one resumable pass, and what it cost."""
