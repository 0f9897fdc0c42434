"""The names of schedules, predictions, solvers and samplers that options take. Free of torch."""

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
PREDICTION_TYPES = ("sample", "epsilon", "v_prediction", "flow_prediction")
# Solvers of a trajectory, see `schedulers.trajectories`.
TEACHER_SOLVERS = ("dpm-solver++", "euler", "heun")
# Diffusers' samplers that a base model is compared under, see `pipelines.stock_samplers`.
STOCK_SAMPLERS = ("ddim", "pndm", "dpm++1s", "dpm++2s", "dpm++3s", "dpm++2m", "dpm++3m", "unipc", "euler", "heun")
