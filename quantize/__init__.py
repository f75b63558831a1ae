"""From a source checkpoint to an artifact: recipes, the search for scales, one resumable streaming pass, and what it cost."""
