/* Shared by the shims that are preloaded (faults.c, recorder.c): which path a call is about, and how libc is called. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* The function of this name in the library that would have been called without the shim. */
#define REAL(type, name, params) \
    static type(*real) params; \
    if (real == NULL) real = (type(*) params)dlsym(RTLD_NEXT, #name)

/* The absolute path of `path` as seen from the directory `fd`, or of `fd` itself; empty where there is none. */
static const char *absolute(int fd, const char *path, char *out) {
    char link[64] = "";
    size_t length = 0;
    if (path == NULL || (path[0] != '/' && fd != AT_FDCWD)) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t read = syscall(SYS_readlinkat, AT_FDCWD, link, out, PATH_MAX - 1);
        length = read < 0 ? 0 : read;
    } else if (path[0] != '/' && getcwd(out, PATH_MAX) != NULL) {
        length = strlen(out);
    }
    out[length] = 0;
    if (path != NULL) snprintf(out + length, PATH_MAX - length, "%s%s", path[0] == '/' ? "" : "/", path);
    return out;
}

static int lies_below(const char *folder, const char *path) {
    return strncmp(path, folder, strlen(folder)) == 0 && path[strlen(folder)] == '/';
}
