"""The run's folder replayed into MLflow: runs, datasets, registered models, the champion."""
