"""From images to blur maps."""
