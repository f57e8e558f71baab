import os

# read when triton is imported, which transformers does on its own: its kernels run without a GPU
os.environ["TRITON_INTERPRET"] = "1"
# read when torch is imported, here and by what tests start: pytest-xdist fills the cores already, and threads that wait
# for each other in matrices as small as these take longer than one that does the work
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
