// Loaded before ExecuTorch, this takes the place of XNNPACK's own function: delegated kernels take their memory and
// compute nothing, so that a program's memory can be measured without the time that it takes.
int xnn_invoke_runtime(void* runtime) {
  (void)runtime;
  return 0;  // success
}
