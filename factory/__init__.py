"""Makes the data of experts and ships it: template + seeds -> datasets -> package."""
