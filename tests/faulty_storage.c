/* A disk that fails, for the processes that preload this library (LD_PRELOAD; Linux).
 *
 * Armed by faulty_storage(), it lets the n-th call of one kind on a file whose path contains a text
 * fail with an error, be short, or take its time; all other calls pass. The plan lies in memory that
 * processes share with those they fork, so that it counts and fails the calls of all of them.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

static struct {
  char kind[16], path[PATH_MAX];
  long first, last, microseconds;  /* which calls, counted from 1, and how long each waits */
  int error;                       /* errno; 0: none; -1: half of what was asked for */
  atomic_long calls;
} *plan;

__attribute__((constructor)) static void begin(void) {
  plan = mmap(NULL, sizeof *plan, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (plan == MAP_FAILED) plan = NULL;
}

/* Arms the calls first to last of a kind (open, read, write, sync, close, rename); "" disarms. */
void faulty_storage(const char *kind, const char *path, long first, long last, int error,
                    long microseconds) {
  plan->kind[0] = 0;
  snprintf(plan->path, sizeof plan->path, "%s", path);
  plan->first = first, plan->last = last, plan->error = error, plan->microseconds = microseconds;
  plan->calls = 0;
  snprintf(plan->kind, sizeof plan->kind, "%s", kind);
}

/* Counts the calls that were looked at since then. */
long faulty_storage_calls(void) { return plan->calls; }

static int fault(const char *kind, const char *path) {
  if (!plan || !plan->kind[0] || strcmp(kind, plan->kind) || !strstr(path, plan->path)) return 0;
  long call = ++plan->calls;
  if (call < plan->first || call > plan->last) return 0;
  if (plan->microseconds) usleep(plan->microseconds);
  if (plan->error > 0) errno = plan->error;
  return plan->error;
}

static int fault_of(const char *kind, int file) {
  if (!plan || !plan->kind[0] || strcmp(kind, plan->kind)) return 0;
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return fault(kind, path);
}

#define NEXT(name) static __typeof__(&name) next; if (!next) next = dlsym(RTLD_NEXT, #name)

#define OPEN(name, ...)                                                                         \
  {                                                                                             \
    NEXT(name);                                                                                 \
    va_list rest;                                                                               \
    va_start(rest, flags);                                                                      \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                     \
    va_end(rest);                                                                               \
    return fault("open", path) > 0 ? -1 : next(__VA_ARGS__ path, flags, mode);                  \
  }
int open(const char *path, int flags, ...) OPEN(open)
int open64(const char *path, int flags, ...) OPEN(open64)
int openat(int at, const char *path, int flags, ...) OPEN(openat, at, )
int openat64(int at, const char *path, int flags, ...) OPEN(openat64, at, )

#define TRANSFER(kind, name, ...)              \
  {                                            \
    NEXT(name);                                \
    int failed = fault_of(kind, file);         \
    if (failed > 0) return -1;                 \
    if (failed < 0 && size > 1) size /= 2;     \
    return next(file, data, size __VA_ARGS__); \
  }
ssize_t write(int file, const void *data, size_t size) TRANSFER("write", write)
ssize_t read(int file, void *data, size_t size) TRANSFER("read", read)
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at)
    TRANSFER("write", pwrite64, , at)
ssize_t pread64(int file, void *data, size_t size, off64_t at) TRANSFER("read", pread64, , at)

ssize_t writev(int file, const struct iovec *data, int count) {
  NEXT(writev);
  int failed = fault_of("write", file);
  return failed > 0 ? -1 : next(file, data, failed < 0 ? 1 : count);
}

int fsync(int file) {
  NEXT(fsync);
  return fault_of("sync", file) > 0 ? -1 : next(file);
}

int fdatasync(int file) {
  NEXT(fdatasync);
  return fault_of("sync", file) > 0 ? -1 : next(file);
}

int close(int file) {
  NEXT(close);
  int failed = fault_of("close", file), error = errno;
  int closed = next(file); /* Linux closes the file in any case */
  if (failed <= 0) return closed;
  errno = error;
  return -1;
}

int rename(const char *from, const char *to) {
  NEXT(rename);
  return fault("rename", to) > 0 ? -1 : next(from, to);
}
