"""The record of runs in MLflow: runs, datasets, registered models, the champion."""
