/* Stands between a process and its system calls on files below a directory.
 *
 * Counts the calls that change something there, and lets the n-th of them fail. See shim.py.
 * Loaded with LD_PRELOAD; until `fault_arm` is called, it does nothing.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, FAIL_ONCE, FAIL_ON, SHORT, KILL };
#define FDS 4096

static char prefix[PATH_MAX];
static size_t prefix_length;
static int mode, number;
static long fault_at;
static useconds_t delay;
static atomic_long calls, mapped;
static atomic_int tears;
static atomic_char below[FDS];
static char faulted[PATH_MAX + 64];

void fault_arm(const char *directory, int new_mode, long at, int error, unsigned microseconds) {
    prefix_length = 0;
    snprintf(prefix, sizeof prefix, "%s", directory);
    calls = mapped = tears = 0;
    faulted[0] = 0;
    mode = new_mode, fault_at = at, number = error, delay = microseconds;
    prefix_length = strlen(prefix);
}
long fault_calls(void) { return calls; }
long fault_mapped(void) { return mapped; }
const char *fault_place(void) { return faulted; }

static int is_below(int directory, const char *path) {
    char whole[2 * PATH_MAX], base[PATH_MAX], link[32];
    if (!prefix_length || !path) return 0;
    if (path[0] != '/') {
        snprintf(link, sizeof link, directory == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d",
                 directory);
        ssize_t length = readlink(link, base, sizeof base - 1);
        if (length < 0) return 0;
        base[length] = 0;
        snprintf(whole, sizeof whole, "%s/%s", base, path);
        path = whole;
    }
    return !strncmp(path, prefix, prefix_length) &&
           (path[prefix_length] == '/' || !path[prefix_length]);
}

/* Whether the call fails now (-1, errno set), or is to be half done (1). */
static int due(const char *what, const char *path, int gives_room, int is_write) {
    long count = atomic_fetch_add(&calls, 1) + 1;
    int full = number == ENOSPC || number == EDQUOT;
    if (delay) usleep(delay);
    if (mode == COUNT || count < fault_at) return 0;
    if (mode == KILL) {
        if (is_write && count == fault_at) return 1;
        raise(SIGKILL);
    }
    /* A full disk lets files be removed. */
    if (gives_room && full) return 0;
    if (mode == FAIL_ONCE && count != fault_at) return 0;
    if (mode == SHORT && !tears) return is_write && !atomic_exchange(&tears, 1);
    if (!faulted[0]) snprintf(faulted, sizeof faulted, "%s %s", what, path ? path : "");
    errno = number;
    return -1;
}

static int due_at(const char *what, int file, int is_write) {
    char link[32], path[PATH_MAX] = "";
    if (!prefix_length || file < 0 || file >= FDS || !below[file]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    return due(what, path, 0, is_write);
}

#define REAL(result, name, ...)                                                                    \
    static result (*real)(__VA_ARGS__);                                                            \
    if (!real) real = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static int opened(int file, int ours) {
    if (file >= 0 && file < FDS) below[file] = ours;
    return file;
}

#define CHANGES (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)
#define OPEN(name)                                                                                 \
    int name(const char *path, int flags, ...) {                                                   \
        REAL(int, #name, const char *, int, ...);                                                  \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode_t bits = va_arg(rest, mode_t);                                                        \
        va_end(rest);                                                                              \
        int ours = (flags & CHANGES) && is_below(AT_FDCWD, path);                                  \
        if (ours && due("open", path, 0, 0)) return -1;                                            \
        return opened(real(path, flags, bits), ours);                                              \
    }
#define OPENAT(name)                                                                               \
    int name(int directory, const char *path, int flags, ...) {                                    \
        REAL(int, #name, int, const char *, int, ...);                                             \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode_t bits = va_arg(rest, mode_t);                                                        \
        va_end(rest);                                                                              \
        int ours = (flags & CHANGES) && is_below(directory, path);                                 \
        if (ours && due("openat", path, 0, 0)) return -1;                                          \
        return opened(real(directory, path, flags, bits), ours);                                   \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

int close(int file) {
    REAL(int, "close", int);
    opened(file, 0);
    return real(file);
}

/* Half of a write that ends the process, or is followed by one that fails. */
#define WRITE(name, type, ...)                                                                     \
    ssize_t name(int file, type data, size_t size __VA_OPT__(, off_t at)) {                        \
        REAL(ssize_t, #name, int, type, size_t __VA_OPT__(, off_t));                               \
        int found = due_at(#name, file, 1);                                                        \
        if (found < 0) return -1;                                                                  \
        ssize_t done = real(file, data, found ? (size + 1) / 2 : size __VA_OPT__(, at));           \
        if (found && mode == KILL) raise(SIGKILL);                                                 \
        return done;                                                                               \
    }
WRITE(write, const void *)
WRITE(pwrite, const void *, at)
WRITE(pwrite64, const void *, at)

ssize_t writev(int file, const struct iovec *parts, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    int found = due_at("writev", file, 1);
    if (found < 0) return -1;
    ssize_t done = real(file, parts, found ? (count + 1) / 2 : count);
    if (found && mode == KILL) raise(SIGKILL);
    return done;
}

#define COPY(name, places, given)                                                                  \
    ssize_t name places {                                                                          \
        REAL(ssize_t, #name, int, void *, int, void *, size_t, unsigned);                          \
        int found = due_at(#name, out, 1);                                                         \
        if (found < 0) return -1;                                                                  \
        if (found) size = (size + 1) / 2;                                                          \
        ssize_t done = ((ssize_t(*) places)(void *)real)given;                                     \
        if (found && mode == KILL) raise(SIGKILL);                                                 \
        return done;                                                                               \
    }
COPY(sendfile, (int out, int in, off_t *at, size_t size), (out, in, at, size))
COPY(sendfile64, (int out, int in, off_t *at, size_t size), (out, in, at, size))
COPY(copy_file_range, (int in, off_t *from, int out, off_t *to, size_t size, unsigned flags),
     (in, from, out, to, size, flags))

#define ON_FILE(name, places, given, ...)                                                          \
    int name places {                                                                              \
        REAL(int, #name, __VA_ARGS__);                                                             \
        return due_at(#name, file, 0) ? -1 : real given;                                           \
    }
ON_FILE(fsync, (int file), (file), int)
ON_FILE(fdatasync, (int file), (file), int)
ON_FILE(ftruncate, (int file, off_t size), (file, size), int, off_t)
ON_FILE(ftruncate64, (int file, off_t size), (file, size), int, off_t)

/* These return the error's number. */
#define ALLOCATE(name)                                                                             \
    int name(int file, off_t at, off_t size) {                                                     \
        REAL(int, #name, int, off_t, off_t);                                                       \
        return due_at(#name, file, 0) ? errno : real(file, at, size);                              \
    }
ALLOCATE(posix_fallocate)
ALLOCATE(posix_fallocate64)

#define ON_PATH(name, first, path, gives_room, places, given, ...)                                 \
    int name places {                                                                              \
        REAL(int, #name, __VA_ARGS__);                                                             \
        if (is_below(first, path) && due(#name, path, gives_room, 0)) return -1;                   \
        return real given;                                                                         \
    }
ON_PATH(rename, AT_FDCWD, to, 0, (const char *from, const char *to), (from, to), const char *,
        const char *)
ON_PATH(renameat, b, to, 0, (int a, const char *from, int b, const char *to), (a, from, b, to),
        int, const char *, int, const char *)
ON_PATH(renameat2, b, to, 0, (int a, const char *from, int b, const char *to, unsigned flags),
        (a, from, b, to, flags), int, const char *, int, const char *, unsigned)
ON_PATH(link, AT_FDCWD, to, 0, (const char *from, const char *to), (from, to), const char *,
        const char *)
ON_PATH(linkat, b, to, 0, (int a, const char *from, int b, const char *to, int flags),
        (a, from, b, to, flags), int, const char *, int, const char *, int)
ON_PATH(symlink, AT_FDCWD, to, 0, (const char *from, const char *to), (from, to), const char *,
        const char *)
ON_PATH(mkdir, AT_FDCWD, path, 0, (const char *path, mode_t bits), (path, bits), const char *,
        mode_t)
ON_PATH(mkdirat, a, path, 0, (int a, const char *path, mode_t bits), (a, path, bits), int,
        const char *, mode_t)
ON_PATH(unlink, AT_FDCWD, path, 1, (const char *path), (path), const char *)
ON_PATH(unlinkat, a, path, 1, (int a, const char *path, int flags), (a, path, flags), int,
        const char *, int)
ON_PATH(rmdir, AT_FDCWD, path, 1, (const char *path), (path), const char *)
ON_PATH(truncate, AT_FDCWD, path, 0, (const char *path, off_t size), (path, size), const char *,
        off_t)

/* What is written through memory is not seen: only that it could be. */
#define MAP(name)                                                                                  \
    void *name(void *where, size_t size, int bits, int flags, int file, off_t at) {                \
        REAL(void *, #name, void *, size_t, int, int, int, off_t);                                 \
        int ours = prefix_length && file >= 0 && file < FDS && below[file];                        \
        if (ours && (bits & PROT_WRITE) && (flags & MAP_SHARED)) atomic_fetch_add(&mapped, 1);     \
        return real(where, size, bits, flags, file, at);                                           \
    }
MAP(mmap)
MAP(mmap64)
