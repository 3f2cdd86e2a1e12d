// Runs kernels for a test in another process: `server ISA`, calls on standard input, results on standard output.
// So the same tests run on kernels built with sanitizers, and on those of another processor under an emulator.
//
// A call is a line `OP INTEGERS n ... BUFFERS n ...`, where a buffer is i<bytes> (input), o<bytes> (output) or
// 0 (null), and then the bytes of the inputs. The answer is `ok VALUE BYTES` and the bytes of the outputs, or
// `error TEXT`. Each call is run three times, in differently placed memory (buffers.h) and with 1, 2 and 3 threads,
// and must give the same bits. A stray access ends the process with a report on standard error.
#include <csignal>
#include <cinttypes>
#include <string>
#include <vector>

#include "buffers.h"
#include "kernels.h"
#include "parallel.h"
#include "threads.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define SANITIZED 1
#endif
#endif

namespace {

using namespace fourbit;

constexpr int MAX_INTEGERS = 8, MAX_BUFFERS = 10;

struct Call {
  char op[64] = "";
  int integers = 0, buffers = 0;
  int64_t integer[MAX_INTEGERS] = {};
  char kind[MAX_BUFFERS] = {};
  size_t size[MAX_BUFFERS] = {};
  std::vector<uint8_t> input[MAX_BUFFERS];
};

struct Run {
  Placement placement;
  int threads;
};
constexpr Run RUNS[] = {{AT_END, 1}, {AT_BEGIN, 2}, {HEAP, 3}};

Call call;
Buffer* memory = nullptr;  // of the run that is going on

[[noreturn]] void protocol_error(const char* what) {
  std::fprintf(stderr, "server: malformed call %s: %s\n", call.op, what);
  std::exit(2);
}

// ---- a fault: say where ---------------------------------------------------------------------------------

[[maybe_unused]] void report_fault(int number, siginfo_t* info, void*) {
  const auto* address = static_cast<const uint8_t*>(info->si_addr);
  std::fprintf(stderr, "server: signal %d in %s at %p\n", number, call.op, info->si_addr);
  std::fprintf(stderr, "  integers:");
  for (int i = 0; i < call.integers; ++i) std::fprintf(stderr, " %" PRId64, call.integer[i]);
  std::fprintf(stderr, "\n");
  for (int i = 0; memory != nullptr && i < call.buffers; ++i) {
    if (!memory[i].surrounds(address)) continue;
    std::fprintf(stderr, "  %td bytes from the begin of buffer %d (%s), which has %zu bytes\n",
                 address - memory[i].data(), i, call.kind[i] == 'i' ? "input" : "output", memory[i].size());
  }
  std::_Exit(128 + number);
}

// ---- the ops ----------------------------------------------------------------------------------------------

// The call's arguments, one after another.
struct Arguments {
  int next_integer = 0, next_buffer = 0;
  int64_t integer() {
    if (next_integer == call.integers) protocol_error("too few integers");
    return call.integer[next_integer++];
  }
  Dtype dtype() { return static_cast<Dtype>(integer()); }
  template <typename T>
  T* pointer() {
    if (next_buffer == call.buffers) protocol_error("too few buffers");
    const int i = next_buffer++;
    return call.kind[i] == '0' ? nullptr : reinterpret_cast<T*>(memory[i].data());
  }
  Weight weight() {
    Weight weight{};
    weight.packed = pointer<const uint8_t>();
    weight.absmax = pointer<const void>();
    weight.code = pointer<const float>();
    weight.blocksize = integer();
    weight.nested_absmax = pointer<const float>();
    weight.nested_code = pointer<const float>();
    weight.nested_offset = pointer<const float>();
    return weight;
  }
  void complete() {
    if (next_integer != call.integers || next_buffer != call.buffers) protocol_error("too many arguments");
  }
};

// Accesses one byte: of buffer `integer 0` at `integer 1`, written if `integer 2`. Shows that strays are caught.
void probe_access() {
  volatile uint8_t* byte = memory[call.integer[0]].data() + call.integer[1];
  if (call.integer[2] != 0)
    *byte = 1;
  else
    static_cast<void>(*byte);
}

// Results that depend on the number of threads. Shows that this is caught.
void probe_threads() { memory[0].data()[0] = static_cast<uint8_t>(thread_count); }

// Threads that write to one place. Shows that ThreadSanitizer is at work.
void probe_race() {
  auto* counter = reinterpret_cast<int32_t*>(memory[0].data());
  *counter = 0;
  const auto body = [](int64_t begin, int64_t end, void* context) {
    for (int64_t i = begin; i < end; ++i) *static_cast<volatile int32_t*>(context) = 1;
  };
  parallel_for(0, 1000, 1, body, counter);
}

void check_memory(int64_t missing) {
  if (missing == 0) return;
  std::fprintf(stderr, "server: %s has no memory for %" PRId64 " bytes of scratch\n", call.op, missing);
  std::exit(3);
}

// What the kernel returns, or -1.
int64_t run_op(const Kernels& kernels) {
  const std::string op = call.op;
  Arguments a;
  if (op == "probe_access") {
    probe_access();
  } else if (op == "probe_threads") {
    probe_threads();
  } else if (op == "probe_race") {
    probe_race();
  } else if (op == "quantize_4bit" || op == "quantize_blockwise") {
    const auto* w = a.pointer<const void>();
    const Dtype dtype = a.dtype();
    const int64_t count = a.integer();
    const auto* code = a.pointer<const float>();
    const int64_t blocksize = a.integer();
    auto* codes = a.pointer<uint8_t>();
    auto* absmax = a.pointer<float>();
    if (op == "quantize_4bit") {
      const bool signed_scale = a.integer() != 0;
      a.complete();
      kernels.quantize_4bit(w, dtype, count, code, blocksize, signed_scale, codes, absmax);
    } else {
      a.complete();
      kernels.quantize_blockwise(w, dtype, count, code, blocksize, codes, absmax);
    }
  } else if (op == "dequantize_blockwise") {
    const auto* codes = a.pointer<const uint8_t>();
    const auto* absmax = a.pointer<const float>();
    const int64_t count = a.integer();
    const auto* code = a.pointer<const float>();
    const int64_t blocksize = a.integer();
    const Dtype dtype = a.dtype();
    auto* out = a.pointer<void>();
    a.complete();
    kernels.dequantize_blockwise(codes, absmax, count, code, blocksize, dtype, out);
  } else if (op == "dequantize_4bit") {
    const Weight weight = a.weight();
    const int64_t count = a.integer();
    const Dtype dtype = a.dtype();
    auto* out = a.pointer<void>();
    a.complete();
    kernels.dequantize_4bit(weight, count, dtype, out);
  } else if (op == "embedding_4bit") {
    const auto* ids = a.pointer<const void>();
    const int id_bytes = static_cast<int>(a.integer());
    const int64_t count = a.integer(), rows = a.integer(), dim = a.integer();
    const Weight weight = a.weight();
    const Dtype dtype = a.dtype();
    auto* out = a.pointer<void>();
    a.complete();
    return kernels.embedding_4bit(ids, id_bytes, count, rows, dim, weight, dtype, out);
  } else if (op == "linear_4bit" || op == "linear_4bit_grad") {
    const auto* x = a.pointer<const void>();
    const Dtype dtype = a.dtype();
    const int64_t m = a.integer(), n = a.integer(), k = a.integer();
    const Weight weight = a.weight();
    const void* bias = op == "linear_4bit" ? a.pointer<const void>() : nullptr;
    auto* out = a.pointer<void>();
    a.complete();
    check_memory(op == "linear_4bit" ? kernels.linear_4bit(x, dtype, m, n, k, weight, bias, out)
                                     : kernels.linear_4bit_grad(x, dtype, m, n, k, weight, out));
  } else if (op == "grouped_linear_4bit" || op == "grouped_linear_4bit_grad") {
    const auto* x = a.pointer<const void>();
    const Dtype dtype = a.dtype();
    const int64_t rows = a.integer();
    const auto* ends = a.pointer<const int64_t>();
    const int64_t experts = a.integer(), n = a.integer(), k = a.integer();
    const Weight weight = a.weight();
    auto* out = a.pointer<void>();
    a.complete();
    const auto kernel = op == "grouped_linear_4bit" ? kernels.grouped_linear_4bit : kernels.grouped_linear_4bit_grad;
    check_memory(kernel(x, dtype, rows, ends, experts, n, k, weight, out));
  } else {
    protocol_error("no such op");
  }
  return -1;
}

// ---- calls ------------------------------------------------------------------------------------------------

// False at the end of the input.
bool read_call() {
  call = Call{};
  if (std::scanf("%63s INTEGERS %d", call.op, &call.integers) != 2) return false;
  if (call.integers < 0 || call.integers > MAX_INTEGERS) protocol_error("number of integers");
  for (int i = 0; i < call.integers; ++i)
    if (std::scanf("%" SCNd64, &call.integer[i]) != 1) protocol_error("integer");
  if (std::scanf(" BUFFERS %d", &call.buffers) != 1 || call.buffers < 0 || call.buffers > MAX_BUFFERS)
    protocol_error("number of buffers");
  for (int i = 0; i < call.buffers; ++i)
    if (std::scanf(" %c%zu", &call.kind[i], &call.size[i]) != 2) protocol_error("buffer");
  if (std::getchar() != '\n') protocol_error("no end of line");
  for (int i = 0; i < call.buffers; ++i) {
    if (call.kind[i] != 'i') continue;
    call.input[i].resize(call.size[i]);
    if (call.size[i] != 0 && std::fread(call.input[i].data(), 1, call.size[i], stdin) != call.size[i])
      protocol_error("input ends early");
  }
  return true;
}

std::string text(const Run& run) {
  const char* places[] = {"buffers that end at a page", "buffers that begin at a page", "buffers of the heap"};
  return std::string(places[run.placement]) + " and " + std::to_string(run.threads) + " threads";
}

// Runs the call once. An error's text, or "".
std::string run_once(const Kernels& kernels, const Run& run, int64_t& value, std::vector<uint8_t>& outputs) {
  Buffer buffers[MAX_BUFFERS];
  memory = buffers;
  for (int i = 0; i < call.buffers; ++i) {
    if (call.kind[i] == '0') continue;
    buffers[i].allocate(run.placement, call.size[i]);
    if (call.kind[i] != 'i') continue;
    if (call.size[i] != 0) std::memcpy(buffers[i].data(), call.input[i].data(), call.size[i]);
    buffers[i].make_read_only();
  }
  thread_count = run.threads;
  value = run_op(kernels);
  memory = nullptr;
  for (int i = 0; i < call.buffers; ++i) {
    if (call.kind[i] == '0') continue;
    if (!buffers[i].surroundings_intact())
      return "a write beside buffer " + std::to_string(i) + ", with " + text(run);
    const uint8_t* data = buffers[i].data();
    if (call.kind[i] == 'o')
      outputs.insert(outputs.end(), data, data + call.size[i]);
    else if (call.size[i] != 0 && std::memcmp(data, call.input[i].data(), call.size[i]) != 0)
      return "a write to input " + std::to_string(i) + ", with " + text(run);
  }
  return "";
}

// Runs the call as often as there are RUNS, and answers.
void serve(const Kernels& kernels) {
  int64_t value = 0;
  std::vector<uint8_t> outputs;
  std::string error = run_once(kernels, RUNS[0], value, outputs);
  for (size_t i = 1; i < sizeof RUNS / sizeof RUNS[0] && error.empty(); ++i) {
    int64_t again = 0;
    std::vector<uint8_t> others;
    error = run_once(kernels, RUNS[i], again, others);
    if (error.empty() && (again != value || (value < 0 && others != outputs)))  // a bad id leaves outputs open
      error = "other results with " + text(RUNS[i]) + " than with " + text(RUNS[0]);
  }
  if (!error.empty()) {
    std::printf("error %s\n", error.c_str());
  } else {
    std::printf("ok %" PRId64 " %zu\n", value, outputs.size());
    if (!outputs.empty()) std::fwrite(outputs.data(), 1, outputs.size(), stdout);
  }
  std::fflush(stdout);
}

}  // namespace

int main(int count, char** arguments) {
  const std::string wanted = count > 1 ? arguments[1] : "";
  const Kernels* chosen = nullptr;
  for (const Kernels* const* item = available_kernels(); *item != nullptr; ++item) {
    if (wanted == "--list") std::puts((*item)->name);
    if (wanted == (*item)->name) chosen = *item;
  }
  if (wanted == "--list") return 0;
  if (chosen == nullptr) {
    std::fprintf(stderr, "usage: server --list | server ISA\n");
    return 2;
  }
#if !defined(SANITIZED)
  struct sigaction action = {};
  action.sa_sigaction = report_fault;
  action.sa_flags = SA_SIGINFO;
  for (const int number : {SIGSEGV, SIGBUS, SIGILL}) sigaction(number, &action, nullptr);
#endif
  set_parallel_for(parallel_for);
  while (read_call()) serve(*chosen);
  return std::feof(stdin) ? 0 : 2;
}
