/* What a process does to the files below a directory is written down, call by call. Linux, LD_PRELOAD; see powercut.py.
 *
 * Every libc call that succeeded and changed something below RECORD_BELOW is appended to RECORD_LOG: a line
 * `kind inode offset length-of-path length-of-second-path length-of-data`, then the two paths and the data as they are.
 * One lock is held around each call and its line, so that the order of the lines is the order of the calls. What was
 * written is read back from the file: that covers every way to write, and a write that took only a part.
 * A file gets a `create` line when it comes to be; a truncating open of one that was there gets a `truncate` line.
 *
 * Not seen: changes through mmap, io_uring or syscall(2), and what stdio writes when it flushes. powercut.py asserts
 * that there were none: the record, played back, has to give what lies on disk.
 */
#include "below.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int concerns(const char *path) {
    const char *below = getenv("RECORD_BELOW");
    return below != NULL && lies_below(below, path);
}

static ino_t inode_of(int fd) {
    struct stat found;
    return fstat(fd, &found) == 0 ? found.st_ino : 0;
}

static void put(int out, const void *data, size_t length) {
    for (const char *next = data; length > 0;) {
        ssize_t count = syscall(SYS_write, out, next, length);
        if (count <= 0) abort();
        next += count, length -= count;
    }
}

static void record(const char *kind, ino_t inode, off_t offset, const char *one, const char *two, const char *data,
                   size_t length) {
    char line[128];
    int out = syscall(SYS_openat, AT_FDCWD, getenv("RECORD_LOG"), O_WRONLY | O_CREAT | O_APPEND, 0644);
    int size = snprintf(line, sizeof line, "%s %lu %ld %zu %zu %zu\n", kind, (unsigned long)inode, (long)offset,
                        strlen(one), strlen(two), length);
    put(out, line, size), put(out, one, strlen(one)), put(out, two, strlen(two)), put(out, data, length);
    syscall(SYS_close, out);
}

/* So many bytes at an offset of the file that `fd` is open on, read back and recorded. */
static void record_written(int fd, const char *path, off_t offset, size_t length) {
    char link[64], *data = malloc(length);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int in = syscall(SYS_openat, AT_FDCWD, link, O_RDONLY);
    for (size_t done = 0; done < length;) {
        ssize_t count = syscall(SYS_pread64, in, data + done, length - done, offset + done);
        if (count <= 0) abort();
        done += count;
    }
    syscall(SYS_close, in);
    record("write", inode_of(fd), offset, path, "", data, length);
    free(data);
}

#define BEGIN \
    int before = errno; \
    pthread_mutex_lock(&lock); \
    errno = before
#define END \
    int after = errno; \
    pthread_mutex_unlock(&lock); \
    errno = after; \
    return result

/* An open: is the file new, or was it emptied? */
static void record_open(int fd, const char *path, int flags, int existed) {
    if (!existed) record("create", inode_of(fd), 0, path, "", "", 0);
    else if (flags & O_TRUNC) record("truncate", inode_of(fd), 0, path, "", "", 0);
}

#define OPEN(name, base, given, passed) \
    int name(given const char *path, int flags, ...) { \
        REAL(int, name, (given const char *, int, mode_t)); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        char full[PATH_MAX]; \
        struct stat found; \
        if (!(flags & (O_CREAT | O_TRUNC)) || !concerns(absolute(base, path, full))) return real(passed path, flags, mode); \
        if ((flags & O_TMPFILE) == O_TMPFILE) abort(); \
        BEGIN; \
        int existed = fstatat(base, path, &found, 0) == 0; \
        int result = real(passed path, flags, mode); \
        if (result >= 0) record_open(result, full, flags, existed); \
        END; \
    }
#define NONE
#define PARAM int fd,
#define FD fd,
OPEN(open, AT_FDCWD, NONE, NONE) OPEN(open64, AT_FDCWD, NONE, NONE)
OPEN(openat, fd, PARAM, FD) OPEN(openat64, fd, PARAM, FD)

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(FILE *, name, (const char *, const char *)); \
        char full[PATH_MAX]; \
        struct stat found; \
        if (!strpbrk(mode, "wa") || !concerns(absolute(AT_FDCWD, path, full))) return real(path, mode); \
        BEGIN; \
        int existed = fstatat(AT_FDCWD, path, &found, 0) == 0; \
        FILE *result = real(path, mode); \
        if (result != NULL) record_open(fileno(result), full, *mode == 'w' ? O_TRUNC : 0, existed); \
        END; \
    }
FOPEN(fopen) FOPEN(fopen64)

/* `where`: the offset the write went to, looked at when it is done; a plain write has moved its file's own. */
#define WRITE(name, params, args, where) \
    ssize_t name params { \
        REAL(ssize_t, name, params); \
        char full[PATH_MAX]; \
        if (!concerns(absolute(fd, NULL, full))) return real args; \
        BEGIN; \
        ssize_t result = real args; \
        if (result > 0) record_written(fd, full, where, result); \
        END; \
    }
#define MOVED lseek(fd, 0, SEEK_CUR) - result
WRITE(write, (int fd, const void *data, size_t n), (fd, data, n), MOVED)
WRITE(writev, (int fd, const struct iovec *data, int n), (fd, data, n), MOVED)
WRITE(sendfile, (int fd, int from, off_t *at, size_t n), (fd, from, at, n), MOVED)
WRITE(sendfile64, (int fd, int from, off64_t *at, size_t n), (fd, from, at, n), MOVED)
WRITE(pwrite, (int fd, const void *data, size_t n, off_t at), (fd, data, n, at), at)
WRITE(pwrite64, (int fd, const void *data, size_t n, off64_t at), (fd, data, n, at), at)
WRITE(pwritev, (int fd, const struct iovec *d, int n, off_t at), (fd, d, n, at), at)
WRITE(pwritev64, (int fd, const struct iovec *d, int n, off64_t at), (fd, d, n, at), at)
WRITE(pwritev2, (int fd, const struct iovec *d, int n, off_t at, int f), (fd, d, n, at, f), at < 0 ? MOVED : at)
WRITE(pwritev64v2, (int fd, const struct iovec *d, int n, off64_t at, int f), (fd, d, n, at, f), at < 0 ? MOVED : at)

/* A call on an open file that needs no data recorded. */
#define ON_FD(name, kind, params, args, offset) \
    int name params { \
        REAL(int, name, params); \
        char full[PATH_MAX]; \
        absolute(fd, NULL, full); \
        const char *below = getenv("RECORD_BELOW"); \
        if (!concerns(full) && (below == NULL || strcmp(below, full) != 0)) return real args; \
        BEGIN; \
        int result = real args; \
        if (result == 0) record(kind, inode_of(fd), offset, full, "", "", 0); \
        END; \
    }
ON_FD(fsync, "sync", (int fd), (fd), 0)
ON_FD(fdatasync, "sync", (int fd), (fd), 0)
ON_FD(ftruncate, "truncate", (int fd, off_t size), (fd, size), size)
ON_FD(ftruncate64, "truncate", (int fd, off64_t size), (fd, size), size)

static ino_t inode_at(const char *path) {
    struct stat found;
    return lstat(path, &found) == 0 ? found.st_ino : 0;
}

/* A call on one or two names. `new` is the path whose inode is recorded once the call is done. */
#define ON_NAME(name, kind, params, args, fd, path, to_fd, to, offset) \
    int name params { \
        REAL(int, name, params); \
        char one[PATH_MAX], two[PATH_MAX] = ""; \
        const char *second = to; \
        absolute(fd, path, one); \
        if (second != NULL) absolute(to_fd, second, two); \
        if (!concerns(one) && !concerns(two)) return real args; \
        BEGIN; \
        int result = real args; \
        if (result == 0) record(kind, inode_at(one), offset, one, two, "", 0); \
        END; \
    }
ON_NAME(truncate, "truncate", (const char *path, off_t size), (path, size), AT_FDCWD, path, 0, NULL, size)
ON_NAME(truncate64, "truncate", (const char *path, off64_t size), (path, size), AT_FDCWD, path, 0, NULL, size)
ON_NAME(unlink, "remove", (const char *path), (path), AT_FDCWD, path, 0, NULL, 0)
ON_NAME(remove, "remove", (const char *path), (path), AT_FDCWD, path, 0, NULL, 0)
ON_NAME(rmdir, "remove", (const char *path), (path), AT_FDCWD, path, 0, NULL, 0)
ON_NAME(unlinkat, "remove", (int fd, const char *path, int flags), (fd, path, flags), fd, path, 0, NULL, 0)
ON_NAME(mkdir, "mkdir", (const char *path, mode_t mode), (path, mode), AT_FDCWD, path, 0, NULL, 0)
ON_NAME(mkdirat, "mkdir", (int fd, const char *path, mode_t mode), (fd, path, mode), fd, path, 0, NULL, 0)
ON_NAME(link, "link", (const char *path, const char *to), (path, to), AT_FDCWD, path, AT_FDCWD, to, 0)
ON_NAME(linkat, "link", (int a, const char *path, int b, const char *to, int f), (a, path, b, to, f), a, path, b, to, 0)
ON_NAME(rename, "rename", (const char *path, const char *to), (path, to), AT_FDCWD, path, AT_FDCWD, to, 0)
ON_NAME(renameat, "rename", (int a, const char *path, int b, const char *to), (a, path, b, to), a, path, b, to, 0)
ON_NAME(renameat2, "rename", (int a, const char *path, int b, const char *to, unsigned f), (a, path, b, to, f), a, path,
        b, to, f ? (abort(), 0) : 0)

/* The target of a symbolic link is its content: it is recorded as data, as it was given. */
#define SYMLINK(name, params, args, base) \
    int name params { \
        REAL(int, name, params); \
        char full[PATH_MAX]; \
        if (!concerns(absolute(base, path, full))) return real args; \
        BEGIN; \
        int result = real args; \
        if (result == 0) record("symlink", inode_at(full), 0, full, "", target, strlen(target)); \
        END; \
    }
SYMLINK(symlink, (const char *target, const char *path), (target, path), AT_FDCWD)
SYMLINK(symlinkat, (const char *target, int fd, const char *path), (target, fd, path), fd)
