/* Opens a bundle and runs one stage of it, through movd.h alone.
 *
 *   run_stage BUNDLE                                   lists the stages
 *   run_stage BUNDLE STAGE VARIANT [TENSOR=FILE ...]   runs one
 *
 * A file named for an input is read, one named for an output is written: raw items, row-major. Inputs that are not
 * named are zeros, outputs that are not named are dropped. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "movd.h"

enum { FAILED = 2 };

static const char* const kDTypes[] = {"f32", "f16", "bf16", "i64", "i32", "i8", "u8", "bool"};

static int fail(const char* what) {
  fprintf(stderr, "error: %s\n", what);
  return FAILED;
}

static void print_tensors(const char* kind, const movd_tensor* tensors, uint32_t count) {
  for (uint32_t i = 0; i < count; ++i) {
    printf("  %s %s %s [", kind, tensors[i].name, kDTypes[tensors[i].dtype]);
    for (uint32_t k = 0; k < tensors[i].rank; ++k) printf(k == 0 ? "%" PRId32 : ", %" PRId32, tensors[i].shape[k]);
    printf("], %" PRIu64 " bytes\n", tensors[i].size_bytes);
  }
}

static int list_stages(const movd_engine* engine) {
  for (uint32_t i = 0; i < movd_stage_count(engine); ++i) {
    movd_stage stage;
    if (movd_stage_info(engine, i, &stage) != MOVD_OK) return fail(movd_error());
    printf("%s %s, in %" PRIu64 " bytes at least\n", stage.name, stage.variant, stage.least_bytes);
    print_tensors("in ", stage.inputs, stage.input_count);
    print_tensors("out", stage.outputs, stage.output_count);
  }
  return EXIT_SUCCESS;
}

/* The file that the arguments TENSOR=FILE name for a tensor, or NULL. */
static const char* file_for(const char* tensor, int count, char** arguments) {
  const size_t length = strlen(tensor);
  for (int i = 0; i < count; ++i) {
    if (strncmp(arguments[i], tensor, length) == 0 && arguments[i][length] == '=') return arguments[i] + length + 1;
  }
  return NULL;
}

/* Reads or writes just so many bytes; says whether it could. */
static int transfer(const char* path, const char* how, void* data, uint64_t size_bytes) {
  FILE* file = fopen(path, how);
  if (file == NULL) return 0;
  const size_t done = how[0] == 'r' ? fread(data, 1, size_bytes, file) : fwrite(data, 1, size_bytes, file);
  const int whole = done == size_bytes && (how[0] == 'w' || fgetc(file) == EOF);
  return fclose(file) == 0 && whole;
}

static int run_stage(movd_engine* engine, uint32_t index, int count, char** arguments) {
  movd_stage stage;
  if (movd_stage_info(engine, index, &stage) != MOVD_OK) return fail(movd_error());
  movd_input* inputs = calloc(stage.input_count + 1, sizeof *inputs);
  movd_output* outputs = calloc(stage.output_count + 1, sizeof *outputs);
  int code = EXIT_SUCCESS;
  if (inputs == NULL || outputs == NULL) code = fail("out of memory");
  for (uint32_t i = 0; code == EXIT_SUCCESS && i < stage.input_count; ++i) {
    const movd_tensor* tensor = &stage.inputs[i];
    const char* path = file_for(tensor->name, count, arguments);
    void* data = calloc(1, tensor->size_bytes + 1);
    inputs[i].data = data;
    inputs[i].size_bytes = tensor->size_bytes;
    if (data == NULL) code = fail("out of memory");
    else if (path != NULL && !transfer(path, "rb", data, tensor->size_bytes)) {
      fprintf(stderr, "error: %s: cannot be read, or has not just %" PRIu64 " bytes\n", path, tensor->size_bytes);
      code = FAILED;
    }
  }
  for (uint32_t i = 0; code == EXIT_SUCCESS && i < stage.output_count; ++i) {
    outputs[i].data = malloc(stage.outputs[i].size_bytes + 1);
    outputs[i].size_bytes = stage.outputs[i].size_bytes;
    if (outputs[i].data == NULL) code = fail("out of memory");
  }
  if (code == EXIT_SUCCESS &&
      movd_run(engine, index, inputs, stage.input_count, outputs, stage.output_count, MOVD_NONE) != MOVD_OK) {
    code = fail(movd_error());
  }
  for (uint32_t i = 0; code == EXIT_SUCCESS && i < stage.output_count; ++i) {
    const char* path = file_for(stage.outputs[i].name, count, arguments);
    if (path != NULL && !transfer(path, "wb", outputs[i].data, outputs[i].size_bytes)) {
      fprintf(stderr, "error: %s: cannot be written\n", path);
      code = FAILED;
    }
  }
  movd_report report;
  if (code == EXIT_SUCCESS && movd_last_report(engine, index, &report) == MOVD_OK) {
    printf("wall %.3f s: loads %.3f s, runs %.3f s, waits %.3f s; peak %" PRIu64 " bytes, read %" PRIu64
           " bytes, %" PRIu32 " partitions stay\n",
           report.wall_s, report.load_s, report.run_s, report.wait_s, report.peak_bytes, report.read_bytes,
           report.pinned);
  }
  for (uint32_t i = 0; inputs != NULL && i < stage.input_count; ++i) free((void*)inputs[i].data);
  for (uint32_t i = 0; outputs != NULL && i < stage.output_count; ++i) free(outputs[i].data);
  free(inputs);
  free(outputs);
  return code;
}

int main(int argc, char** argv) {
  if (argc != 2 && argc < 4) return fail("usage: run_stage BUNDLE [STAGE VARIANT [TENSOR=FILE ...]]");
  if (movd_version() != MOVD_VERSION) return fail("the library is of another version than movd.h");
  movd_engine* engine;
  if (movd_open(argv[1], NULL, &engine) != MOVD_OK) return fail(movd_error());
  int code = FAILED;
  if (argc == 2) {
    code = list_stages(engine);
  } else {
    uint32_t index = 0;
    movd_stage stage;
    while (movd_stage_info(engine, index, &stage) == MOVD_OK &&
           (strcmp(stage.name, argv[2]) != 0 || strcmp(stage.variant, argv[3]) != 0)) {
      ++index;
    }
    code = index == movd_stage_count(engine) ? fail("the bundle has no such stage; name only the bundle to list them")
                                             : run_stage(engine, index, argc - 4, argv + 4);
  }
  movd_close(engine);
  return code;
}
