"""The student as an MLflow model, kept as this source text: nothing is pickled.

MLflow copies this file and the exported folder into the model, so it uses the folder's own `score.py` and imports nothing
of the product. Input: columns `query`, `ad_title` and, if known, `ad_text`, `attributes`; output: `p_relevant`,
`relevant`, `grade_probs` and, with the parameter `at` (such as "irrelevant:precision=0.95"), `decision`.
"""

import importlib.util
from pathlib import Path

import mlflow
import pandas as pd


class Student(mlflow.pyfunc.PythonModel):
    """Scores a frame of query-ad pairs."""

    def load_context(self, context):  # type: ignore[no-untyped-def]
        folder = Path(context.artifacts["export"])
        spec = importlib.util.spec_from_file_location("exported_student_score", folder / "score.py")
        if spec is None or spec.loader is None:
            raise ImportError(f"{folder} has no score.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.scorer = module.Scorer(folder)

    def predict(self, context, model_input: pd.DataFrame, params=None):  # type: ignore[no-untyped-def]
        rows = []
        for row in model_input.to_dict("records"):
            known = {key: value for key, value in row.items() if value is not None and value is not pd.NA}
            known = {key: value for key, value in known.items() if not (isinstance(value, float) and value != value)}
            rows.append(known)
        probabilities = self.scorer.grade_probs(rows)
        relevant = self.scorer.p_relevant(probabilities)
        frame = pd.DataFrame(
            {
                "p_relevant": relevant,
                "relevant": relevant >= self.scorer.threshold,
                "grade_probs": probabilities.tolist(),
            }
        )
        at = (params or {}).get("at")
        return frame.assign(decision=self.scorer.decide(probabilities, at)) if at else frame


mlflow.models.set_model(Student())
