"""Triton kernels, one module per family; installed as fastcl.kernels."""

if __name__ == "kernels":  # the checkout's folder, found because the working directory is on sys.path
    raise ImportError("this folder is installed as fastcl.kernels; import that, and start Python outside the checkout's root")
