/* A process is killed just before its n-th change to the files below a directory, or gets an error there in its place;
 * the same for what it reads. Linux, LD_PRELOAD; see faults.py.
 *
 * Every libc call that changes the file system is counted over all threads while its path, or one of its two paths,
 * lies below FAULT_BELOW; where FAULT_READS is set, the calls that open, read, list or look are counted in their place.
 * Counting begins with the first call whose path contains FAULT_AFTER and ends with the first one whose path contains
 * FAULT_UNTIL and not FAULT_AFTER (each may be left out). At count FAULT_AT the call is written to FAULT_LOG as
 * `n kind path` and the process gets SIGKILL in place of the call; where FAULT_ERRNO is set the call fails with that
 * error instead, and with FAULT_LASTS all that follow do as well. With FAULT_AT=0 all are written, and none fails.
 * The environment is read at the first call after FAULT_BELOW is there: a process that was forked can still set it.
 * The interposed names are those that Python, libstdc++ and TensorStore import (`nm -D`), and a few more.
 * Apart from that: where FAULT_NO_FLOCK is set no lock is shared, and everybody gets the one that he asks for.
 *
 * Not seen: changes through mmap, io_uring or syscall(2), and what stdio writes when it flushes. A whole run has none:
 * `strace -f -y -e file,desc,mmap` saw the same 593 changes, kind by kind (Python 3.11, TensorStore 0.1.86).
 */
#include "below.h"
#include <sys/mman.h>

enum { BEFORE, COUNTING, PAST };
enum { CHANGE, READ };

static pthread_once_t once = PTHREAD_ONCE_INIT;
static const char *below, *after, *until, *report;
static int at, error_number, lasts, counted;
static atomic_int phase, count;

static void configure(void) {
    const char *number = getenv("FAULT_ERRNO");
    below = getenv("FAULT_BELOW"), after = getenv("FAULT_AFTER"), until = getenv("FAULT_UNTIL");
    report = getenv("FAULT_LOG"), at = atoi(getenv("FAULT_AT"));
    error_number = number == NULL ? 0 : atoi(number), lasts = getenv("FAULT_LASTS") != NULL;
    counted = getenv("FAULT_READS") == NULL ? CHANGE : READ;
    phase = after == NULL ? COUNTING : BEFORE;
}

static int either(const char *one, const char *two, const char *part) { return strstr(one, part) || strstr(two, part); }

static void note(int n, const char *kind, const char *one, const char *two) {
    char line[2 * PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%d %s %s%s%s\n", n, kind, one, *two ? " -> " : "", two);
    int out = syscall(SYS_openat, AT_FDCWD, report, O_WRONLY | O_CREAT | O_APPEND, 0644);
    syscall(SYS_write, out, line, length);
    syscall(SYS_close, out);
}

/* Too many open files are no trouble for those that are open. */
static int can_fail(const char *kind) {
    return (error_number != EMFILE && error_number != ENFILE) || !strcmp(kind, "open") || !strcmp(kind, "list");
}

/* One call that is about to be made, on one path or from one to the other. True where it is to fail, with errno set. */
static int about(int sort, const char *kind, int fd, const char *path, int to_fd, const char *to) {
    if (getenv("FAULT_BELOW") == NULL) return 0;
    int saved = errno, fails = 0;
    char one[PATH_MAX], two[PATH_MAX] = "";
    pthread_once(&once, configure);
    if (sort != counted) return 0;
    absolute(fd, path, one);
    if (to != NULL) absolute(to_fd, to, two);
    if (lies_below(below, one) || lies_below(below, two)) {
        int waiting = BEFORE, counting = COUNTING;
        if (after != NULL && either(one, two, after)) atomic_compare_exchange_strong(&phase, &waiting, COUNTING);
        else if (until != NULL && either(one, two, until)) atomic_compare_exchange_strong(&phase, &counting, PAST);
        int n = phase == COUNTING ? ++count : -1;
        int hit = n > 0 && (n == at || (lasts && at > 0 && n > at && can_fail(kind)));
        if (n > 0 && (at == 0 || n == at)) note(n, kind, one, two);
        if (hit && error_number == 0)
            for (kill(getpid(), SIGKILL);;) pause();
        fails = hit;
    }
    errno = fails ? error_number : saved;
    return fails;
}

static int opened(int fd, const char *path, int flags) {
    int changes = (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);
    return about(changes ? CHANGE : READ, "open", fd, path, 0, NULL);
}

static int writes(const char *mode) { return strpbrk(mode, "wa+") ? O_WRONLY : O_RDONLY; }

/* `fails` says whether the call is to fail, `failure` what it returns then. */
#define CALL(type, name, params, args, failure, fails) \
    type name params { \
        REAL(type, name, params); \
        if (fails) return failure; \
        return real args; \
    }
#define ON_FD(type, name, kind, params, args) \
    CALL(type, name, params, args, -1, about(CHANGE, kind, fd, NULL, 0, NULL))
#define AT_PATH(name, kind, params, args) CALL(int, name, params, args, -1, about(CHANGE, kind, fd, path, 0, NULL))
#define ON_PATH(name, kind, params, args) \
    CALL(int, name, params, args, -1, about(CHANGE, kind, AT_FDCWD, path, 0, NULL))
#define TO_PATH(name, kind, params, args, fd, to_fd) \
    CALL(int, name, params, args, -1, about(CHANGE, kind, fd, path, to_fd, to))
#define OPEN(name, base, given, passed) \
    int name(given const char *path, int flags, ...) { \
        REAL(int, name, (given const char *, int, mode_t)); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if (opened(base, path, flags)) return -1; \
        return real(passed path, flags, mode); \
    }
#define NONE
#define PARAM int fd,
#define FD fd,

OPEN(open, AT_FDCWD, NONE, NONE) OPEN(open64, AT_FDCWD, NONE, NONE)
OPEN(openat, fd, PARAM, FD) OPEN(openat64, fd, PARAM, FD)
CALL(int, __open64_2, (const char *path, int flags), (path, flags), -1, opened(AT_FDCWD, path, flags))
CALL(int, __openat_2, (int fd, const char *path, int flags), (fd, path, flags), -1, opened(fd, path, flags))
CALL(FILE *, fopen, (const char *path, const char *mode), (path, mode), NULL, opened(AT_FDCWD, path, writes(mode)))
CALL(FILE *, fopen64, (const char *path, const char *mode), (path, mode), NULL, opened(AT_FDCWD, path, writes(mode)))
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
CALL(int, unlinkat, (int fd, const char *path, int flags), (fd, path, flags), -1,
     about(CHANGE, flags & AT_REMOVEDIR ? "rmdir" : "unlink", fd, path, 0, NULL))
ON_PATH(rmdir, "rmdir", (const char *path), (path))
ON_PATH(mkdir, "mkdir", (const char *path, mode_t mode), (path, mode))
AT_PATH(mkdirat, "mkdir", (int fd, const char *path, mode_t mode), (fd, path, mode))
ON_PATH(symlink, "symlink", (const char *target, const char *path), (target, path))
AT_PATH(symlinkat, "symlink", (const char *target, int fd, const char *path), (target, fd, path))
TO_PATH(link, "link", (const char *path, const char *to), (path, to), AT_FDCWD, AT_FDCWD)
TO_PATH(rename, "rename", (const char *path, const char *to), (path, to), AT_FDCWD, AT_FDCWD)
TO_PATH(renameat, "rename", (int a, const char *path, int b, const char *to), (a, path, b, to), a, b)
TO_PATH(renameat2, "rename", (int a, const char *path, int b, const char *to, unsigned f), (a, path, b, to, f), a, b)

/* What only looks. */
#define READS(type, name, kind, params, args, failure, fd, path) \
    CALL(type, name, params, args, failure, about(READ, kind, fd, path, 0, NULL))
READS(ssize_t, read, "read", (int fd, void *data, size_t n), (fd, data, n), -1, fd, NULL)
READS(ssize_t, readv, "read", (int fd, const struct iovec *data, int n), (fd, data, n), -1, fd, NULL)
READS(ssize_t, pread, "read", (int fd, void *data, size_t n, off_t at), (fd, data, n, at), -1, fd, NULL)
READS(ssize_t, pread64, "read", (int fd, void *data, size_t n, off64_t at), (fd, data, n, at), -1, fd, NULL)
READS(ssize_t, preadv64v2, "read", (int fd, const struct iovec *d, int n, off64_t at, int f), (fd, d, n, at, f), -1, fd,
      NULL)
READS(DIR *, opendir, "list", (const char *path), (path), NULL, AT_FDCWD, path)
READS(DIR *, fdopendir, "list", (int fd), (fd), NULL, fd, NULL)
READS(struct dirent *, readdir, "list", (DIR *folder), (folder), NULL, dirfd(folder), NULL)
READS(struct dirent64 *, readdir64, "list", (DIR *folder), (folder), NULL, dirfd(folder), NULL)
READS(int, access, "look", (const char *path, int mode), (path, mode), -1, AT_FDCWD, path)
READS(int, faccessat, "look", (int fd, const char *path, int mode, int flags), (fd, path, mode, flags), -1, fd, path)
READS(ssize_t, readlink, "look", (const char *path, char *out, size_t n), (path, out, n), -1, AT_FDCWD, path)
READS(ssize_t, readlinkat, "look", (int fd, const char *path, char *out, size_t n), (fd, path, out, n), -1, fd, path)
READS(void *, mmap, "map", (void *to, size_t n, int rights, int flags, int fd, off_t at),
      (to, n, rights, flags, fd, at), MAP_FAILED, fd, NULL)
READS(void *, mmap64, "map", (void *to, size_t n, int rights, int flags, int fd, off64_t at),
      (to, n, rights, flags, fd, at), MAP_FAILED, fd, NULL)

/* Past libc, which has no such names before 2.33, and keeps the old ones for old programs alone after that. */
#define NO_PATH ((const char *)NULL)
#define LOOKS(name, params, fd, path, out, flags) \
    int name params { \
        if (about(READ, "look", fd, path, 0, NULL)) return -1; \
        return syscall(SYS_newfstatat, fd, path == NULL ? "" : path, out, flags); \
    }
LOOKS(stat, (const char *path, struct stat *out), AT_FDCWD, path, out, 0)
LOOKS(stat64, (const char *path, struct stat64 *out), AT_FDCWD, path, out, 0)
LOOKS(lstat, (const char *path, struct stat *out), AT_FDCWD, path, out, AT_SYMLINK_NOFOLLOW)
LOOKS(lstat64, (const char *path, struct stat64 *out), AT_FDCWD, path, out, AT_SYMLINK_NOFOLLOW)
LOOKS(fstat, (int fd, struct stat *out), fd, NO_PATH, out, AT_EMPTY_PATH)
LOOKS(fstat64, (int fd, struct stat64 *out), fd, NO_PATH, out, AT_EMPTY_PATH)
LOOKS(fstatat, (int fd, const char *path, struct stat *out, int flags), fd, path, out, flags)
LOOKS(fstatat64, (int fd, const char *path, struct stat64 *out, int flags), fd, path, out, flags)
LOOKS(__xstat, (int version, const char *path, struct stat *out), AT_FDCWD, path, out, 0)
LOOKS(__lxstat, (int version, const char *path, struct stat *out), AT_FDCWD, path, out, AT_SYMLINK_NOFOLLOW)
LOOKS(__fxstat, (int version, int fd, struct stat *out), fd, NO_PATH, out, AT_EMPTY_PATH)
LOOKS(__fxstatat, (int version, int fd, const char *path, struct stat *out, int flags), fd, path, out, flags)

int flock(int fd, int operation) {
    REAL(int, flock, (int, int));
    return getenv("FAULT_NO_FLOCK") == NULL ? real(fd, operation) : 0;
}
