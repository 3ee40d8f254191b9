"""The environment variables that change what vlm does. Pure data."""

VARIABLES = {
    "VLM_TRACEBACK": "1: show where in the code an error arose",
    "VLM_CACHE": "where indices and fetched shards are kept (~/.cache/vlm/shards)",
    "HF_HOME": "where published checkpoints are kept (~/.cache/huggingface)",
    "HF_HUB_OFFLINE": "1: never ask the hub, its cache only",
    "HF_ENDPOINT": "another hub in place of https://huggingface.co",
    "OMP_NUM_THREADS": "threads of a product of matrices on the CPU; all cores unless set",
    "CUDA_VISIBLE_DEVICES": "the GPUs that may be used, such as 0,1; empty: none",
}
