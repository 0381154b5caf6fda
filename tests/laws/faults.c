/* A process is killed just before its n-th change to the files below a directory. Linux, LD_PRELOAD; see faults.py.
 *
 * Every libc call that changes the file system is counted over all threads while its path, or one of its two paths,
 * lies below FAULT_BELOW. Counting begins with the first call whose path contains FAULT_AFTER and ends with the first
 * one whose path contains FAULT_UNTIL and not FAULT_AFTER (each may be left out). At count FAULT_AT the call is written
 * to FAULT_LOG as `n kind path` and the process gets SIGKILL in place of the call; with FAULT_AT=0 all are written.
 * The environment is read at the first call after FAULT_BELOW is there: a process that was forked can still set it.
 * The interposed names are those that Python, libstdc++ and TensorStore import (`nm -D`), and a few more.
 *
 * Not seen: changes through mmap, io_uring or syscall(2), and what stdio writes when it flushes. A whole run has none:
 * `strace -f -y -e file,desc,mmap` saw the same 593 changes, kind by kind (Python 3.11, TensorStore 0.1.86).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { BEFORE, COUNTING, PAST };

static pthread_once_t once = PTHREAD_ONCE_INIT;
static const char *below, *after, *until, *report;
static int at;
static atomic_int phase, count;

static void configure(void) {
    below = getenv("FAULT_BELOW"), after = getenv("FAULT_AFTER"), until = getenv("FAULT_UNTIL");
    report = getenv("FAULT_LOG"), at = atoi(getenv("FAULT_AT"));
    phase = after == NULL ? COUNTING : BEFORE;
}

/* The absolute path of `path` as seen from the directory `fd`, or of `fd` itself; empty where there is none. */
static const char *absolute(int fd, const char *path, char *out) {
    char link[64] = "";
    size_t length = 0;
    if (path == NULL || (path[0] != '/' && fd != AT_FDCWD)) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t read = readlink(link, out, PATH_MAX - 1);
        length = read < 0 ? 0 : read;
    } else if (path[0] != '/' && getcwd(out, PATH_MAX) != NULL) {
        length = strlen(out);
    }
    out[length] = 0;
    if (path != NULL) snprintf(out + length, PATH_MAX - length, "%s%s", path[0] == '/' ? "" : "/", path);
    return out;
}

static int inside(const char *path) { return strncmp(path, below, strlen(below)) == 0 && path[strlen(below)] == '/'; }

static int either(const char *one, const char *two, const char *part) { return strstr(one, part) || strstr(two, part); }

static void note(int n, const char *kind, const char *one, const char *two) {
    char line[2 * PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%d %s %s%s%s\n", n, kind, one, *two ? " -> " : "", two);
    int out = syscall(SYS_openat, AT_FDCWD, report, O_WRONLY | O_CREAT | O_APPEND, 0644);
    syscall(SYS_write, out, line, length);
    syscall(SYS_close, out);
}

/* One call that is about to be made, on one path or from one to the other. */
static void about(const char *kind, int fd, const char *path, int to_fd, const char *to) {
    if (getenv("FAULT_BELOW") == NULL) return;
    int saved = errno;
    char one[PATH_MAX], two[PATH_MAX] = "";
    pthread_once(&once, configure);
    absolute(fd, path, one);
    if (to != NULL) absolute(to_fd, to, two);
    if (inside(one) || inside(two)) {
        int waiting = BEFORE, counting = COUNTING;
        if (after != NULL && either(one, two, after)) atomic_compare_exchange_strong(&phase, &waiting, COUNTING);
        else if (until != NULL && either(one, two, until)) atomic_compare_exchange_strong(&phase, &counting, PAST);
        int n = phase == COUNTING ? ++count : -1;
        if (n > 0 && (at == 0 || n == at)) note(n, kind, one, two);
        if (n > 0 && n == at)
            for (kill(getpid(), SIGKILL);;) pause();
    }
    errno = saved;
}

static void opened(int fd, const char *path, int flags) {
    if ((flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC)) about("open", fd, path, 0, NULL);
}

static int writes(const char *mode) { return strpbrk(mode, "wa+") ? O_WRONLY : O_RDONLY; }

#define CALL(type, name, params, args, before) \
    type name params { \
        static type(*real) params; \
        if (real == NULL) real = (type(*) params)dlsym(RTLD_NEXT, #name); \
        before; \
        return real args; \
    }
#define ON_FD(type, name, kind, params, args) CALL(type, name, params, args, about(kind, fd, NULL, 0, NULL))
#define AT_PATH(name, kind, params, args) CALL(int, name, params, args, about(kind, fd, path, 0, NULL))
#define ON_PATH(name, kind, params, args) CALL(int, name, params, args, about(kind, AT_FDCWD, path, 0, NULL))
#define TO_PATH(name, kind, params, args, fd, to_fd) CALL(int, name, params, args, about(kind, fd, path, to_fd, to))
#define OPEN(name, base, given, passed) \
    int name(given const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        opened(base, path, flags); \
        return ((int (*)(given const char *, int, mode_t))dlsym(RTLD_NEXT, #name))(passed path, flags, mode); \
    }
#define NONE
#define PARAM int fd,
#define FD fd,

OPEN(open, AT_FDCWD, NONE, NONE) OPEN(open64, AT_FDCWD, NONE, NONE)
OPEN(openat, fd, PARAM, FD) OPEN(openat64, fd, PARAM, FD)
CALL(int, __open64_2, (const char *path, int flags), (path, flags), opened(AT_FDCWD, path, flags))
CALL(int, __openat_2, (int fd, const char *path, int flags), (fd, path, flags), opened(fd, path, flags))
CALL(FILE *, fopen, (const char *path, const char *mode), (path, mode), opened(AT_FDCWD, path, writes(mode)))
CALL(FILE *, fopen64, (const char *path, const char *mode), (path, mode), opened(AT_FDCWD, path, writes(mode)))
ON_FD(ssize_t, write, "write", (int fd, const void *data, size_t n), (fd, data, n))
ON_FD(ssize_t, pwrite64, "write", (int fd, const void *data, size_t n, off64_t at), (fd, data, n, at))
ON_FD(ssize_t, writev, "write", (int fd, const struct iovec *data, int n), (fd, data, n))
ON_FD(ssize_t, pwritev64v2, "write", (int fd, const struct iovec *d, int n, off64_t at, int f), (fd, d, n, at, f))
ON_FD(ssize_t, sendfile64, "write", (int fd, int from, off64_t *at, size_t n), (fd, from, at, n))
ON_FD(int, fsync, "fsync", (int fd), (fd))
ON_FD(int, fdatasync, "fsync", (int fd), (fd))
ON_FD(int, ftruncate, "truncate", (int fd, off_t size), (fd, size))
ON_FD(int, ftruncate64, "truncate", (int fd, off64_t size), (fd, size))
ON_PATH(truncate, "truncate", (const char *path, off_t size), (path, size))
ON_PATH(truncate64, "truncate", (const char *path, off64_t size), (path, size))
ON_PATH(unlink, "unlink", (const char *path), (path))
ON_PATH(remove, "unlink", (const char *path), (path))
CALL(int, unlinkat, (int fd, const char *path, int flags), (fd, path, flags),
     about(flags & AT_REMOVEDIR ? "rmdir" : "unlink", fd, path, 0, NULL))
ON_PATH(rmdir, "rmdir", (const char *path), (path))
ON_PATH(mkdir, "mkdir", (const char *path, mode_t mode), (path, mode))
AT_PATH(mkdirat, "mkdir", (int fd, const char *path, mode_t mode), (fd, path, mode))
ON_PATH(symlink, "symlink", (const char *target, const char *path), (target, path))
AT_PATH(symlinkat, "symlink", (const char *target, int fd, const char *path), (target, fd, path))
TO_PATH(link, "link", (const char *path, const char *to), (path, to), AT_FDCWD, AT_FDCWD)
TO_PATH(rename, "rename", (const char *path, const char *to), (path, to), AT_FDCWD, AT_FDCWD)
TO_PATH(renameat, "rename", (int a, const char *path, int b, const char *to), (a, path, b, to), a, b)
TO_PATH(renameat2, "rename", (int a, const char *path, int b, const char *to, unsigned f), (a, path, b, to, f), a, b)
