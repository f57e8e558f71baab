import os

# read when triton is imported, which transformers does on its own: its kernels run without a GPU
os.environ["TRITON_INTERPRET"] = "1"
