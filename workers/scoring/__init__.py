"""The rules of the published metrics, one file per kind of answer; `workers.scorers` names them."""
