/* Preloaded into a program: makes its calls on files fail, wait or kill it, sets its clock back, and records them.

   CHAOS_TABLE names a file of RULES rules, mapped shared, so that another process changes them while this one runs;
   storage.py writes it. CHAOS_RECORD and CHAOS_ROOT: append a record of each call that changes something below that
   folder to that file, with what was written; storage.py reads it.
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
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { RULES = 64 };
enum { OPEN_READ = 1, OPEN_WRITE = 2, READ = 4, WRITE = 8, SYNC = 16, RENAME = 32, LINK = 64, UNLINK = 128, CUT = 256,
       RESERVE = 512, CLOSE = 1024, MKDIR = 2048, THREAD = 4096, CLOCK = 8192 };
enum { KILL_BEFORE = -1, KILL_AFTER = -2, KILL_TORN = -3 }; /* in place of an errno */

struct rule {
    _Atomic uint32_t active;
    uint32_t calls;           /* the kinds above, as bits */
    int32_t error;            /* an errno, one of KILL_*, or 0 for none */
    _Atomic int32_t skip;     /* let so many calls through first */
    _Atomic int32_t times;    /* then affect so many */
    int32_t wait_ms;          /* wait before each, also without an error */
    _Atomic uint32_t hits;    /* how many were affected */
    int32_t clock_s;          /* seconds added to the time of day */
    char where[224];          /* the path begins with this */
    char part[64];            /* and contains this */
};

static struct rule *rules;
static const char *root;
static int record_to = -1;
static __thread int inside; /* a call of this file's own is left alone */

#define REAL(name) ((__typeof__(&name))real(#name))
static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

__attribute__((constructor)) static void start(void) {
    const char *table = getenv("CHAOS_TABLE"), *record = getenv("CHAOS_RECORD");
    inside = 1;
    if (table) {
        int file = REAL(open)(table, O_RDWR | O_CLOEXEC);
        void *at = file < 0 ? MAP_FAILED : mmap(NULL, RULES * sizeof(struct rule), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        rules = at == MAP_FAILED ? NULL : at;
        if (file >= 0) REAL(close)(file);
    }
    if (record && (root = getenv("CHAOS_ROOT")))
        record_to = REAL(open)(record, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    inside = 0;
}

/* ---- rules ---- */

static int any_rule(uint32_t call) {
    if (!rules || inside) return 0;
    for (int i = 0; i < RULES; i++)
        if (rules[i].active && (rules[i].calls & call)) return 1;
    return 0;
}

/* The rule that affects this call, after waiting as it says; NULL for none. */
static struct rule *affected(uint32_t call, const char *path) {
    for (int i = 0; rules && i < RULES; i++) {
        struct rule *rule = &rules[i];
        if (!rule->active || !(rule->calls & call)) continue;
        if (strncmp(path, rule->where, strlen(rule->where)) || !strstr(path, rule->part)) continue;
        if (atomic_fetch_sub_explicit(&rule->skip, 1, memory_order_relaxed) > 0) continue;
        if (atomic_fetch_sub_explicit(&rule->times, 1, memory_order_relaxed) <= 0) continue;
        rule->hits++;
        if (rule->wait_ms) usleep(1000 * (useconds_t)rule->wait_ms);
        if (rule->error == KILL_BEFORE) kill(getpid(), SIGKILL);
        return rule;
    }
    return NULL;
}

static const char *path_of(int file, char *into) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, into, PATH_MAX - 1);
    into[length < 0 ? 0 : length] = 0;
    return into;
}

static const char *absolute(int folder, const char *path, char *into) {
    if (path[0] == '/') return path;
    char base[PATH_MAX];
    if (folder == AT_FDCWD) { if (!getcwd(base, sizeof base)) base[0] = 0; } else path_of(folder, base);
    snprintf(into, PATH_MAX, "%.2000s/%.2000s", base, path);
    return into;
}

/* ---- records ---- */

struct head { uint32_t call, pid; uint64_t inode, other; int64_t offset, size; uint32_t path, second, data, mode; };

static int below_root(const char *path) { return record_to >= 0 && !strncmp(path, root, strlen(root)); }

static void record(uint32_t call, const char *path, const char *second, uint64_t inode, int64_t offset, int64_t size,
                   const void *data, uint32_t mode) {
    struct head head = {call, (uint32_t)getpid(), inode, 0, offset, size, (uint32_t)strlen(path),
                        second ? (uint32_t)strlen(second) : 0, data ? (uint32_t)size : 0, mode};
    struct iovec parts[4] = {{&head, sizeof head}, {(void *)path, head.path}, {(void *)second, head.second}, {(void *)data, head.data}};
    if (REAL(writev)(record_to, parts, 4) < 0) abort();
}

static uint64_t inode_of(int file) { struct stat found; return fstat(file, &found) ? 0 : found.st_ino; }

enum { CREATED = 1 << 16, SYNC_BEGINS = 1 << 17 }; /* records only, beside the kinds above */

/* ---- calls on a path ---- */

#define FAIL(rule, value) if ((rule) && (rule)->error > 0) { errno = (rule)->error; inside = 0; return value; }
#define AFTER(rule) if ((rule) && (rule)->error <= KILL_AFTER) kill(getpid(), SIGKILL);

static int opened(int (*call)(int, const char *, int, ...), int folder, const char *path, int flags, mode_t mode) {
    char into[PATH_MAX];
    int writes = (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC));
    uint32_t kind = writes ? OPEN_WRITE : OPEN_READ;
    int ruled = any_rule(kind), recorded = record_to >= 0 && !inside && (flags & (O_CREAT | O_TRUNC));
    if (inside || (!ruled && !recorded)) return call(folder, path, flags, mode);
    inside = 1;
    const char *full = absolute(folder, path, into);
    struct rule *rule = ruled ? affected(kind, full) : NULL;
    FAIL(rule, -1)
    struct stat before;
    int there = !recorded || !lstat(full, &before);
    int file = call(folder, path, flags, mode);
    if (recorded && file >= 0 && below_root(full)) {
        if (!there) record(CREATED, full, NULL, inode_of(file), 0, 0, NULL, mode);
        else if (flags & O_TRUNC) record(CUT, full, NULL, inode_of(file), 0, 0, NULL, 0);
    }
    AFTER(rule)
    inside = 0;
    return file;
}

#define MODE va_list list; va_start(list, flags); mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; va_end(list);
static int by_openat(int folder, const char *path, int flags, ...) { MODE return REAL(openat)(folder, path, flags, mode); }
int open(const char *path, int flags, ...) { MODE return opened(by_openat, AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return opened(by_openat, AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE return opened(by_openat, folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE return opened(by_openat, folder, path, flags, mode); }

/* A call that changes names: `made` is the call itself. */
#define NAMES(kind, folder, path, other_folder, second, made) NAMED(kind, folder, path, other_folder, second, NONE, made)
#define NAMED(kind, folder, path, other_folder, second, target, made) \
    char into[PATH_MAX], into2[PATH_MAX]; \
    int ruled = any_rule(kind); \
    if (inside || (!ruled && record_to < 0)) return made; \
    inside = 1; \
    const char *full = absolute(folder, path, into), *full2 = second ? absolute(other_folder, second, into2) : NULL; \
    struct rule *rule = ruled ? affected(kind, full) : NULL; \
    if (!rule && ruled && full2) rule = affected(kind, full2); \
    FAIL(rule, -1) \
    struct stat found; \
    uint64_t inode = lstat(full, &found) ? 0 : found.st_ino; \
    int result = made; \
    if (!result && below_root(full)) record(kind, full, full2, inode, 0, target ? (int64_t)strlen(target) : 0, target, 0); \
    AFTER(rule) \
    inside = 0; \
    return result;

#define NONE ((const char *)0)
int rename(const char *a, const char *b) { NAMES(RENAME, AT_FDCWD, a, AT_FDCWD, b, REAL(rename)(a, b)) }
int renameat(int f, const char *a, int g, const char *b) { NAMES(RENAME, f, a, g, b, REAL(renameat)(f, a, g, b)) }
int link(const char *a, const char *b) { NAMES(LINK, AT_FDCWD, a, AT_FDCWD, b, REAL(link)(a, b)) }
int linkat(int f, const char *a, int g, const char *b, int flags) { NAMES(LINK, f, a, g, b, REAL(linkat)(f, a, g, b, flags)) }
int symlink(const char *a, const char *b) { NAMED(LINK, AT_FDCWD, b, AT_FDCWD, NONE, a, REAL(symlink)(a, b)) }
int symlinkat(const char *a, int g, const char *b) { NAMED(LINK, g, b, AT_FDCWD, NONE, a, REAL(symlinkat)(a, g, b)) }
int unlink(const char *a) { NAMES(UNLINK, AT_FDCWD, a, AT_FDCWD, NONE, REAL(unlink)(a)) }
int unlinkat(int f, const char *a, int flags) { NAMES(UNLINK, f, a, AT_FDCWD, NONE, REAL(unlinkat)(f, a, flags)) }
int rmdir(const char *a) { NAMES(UNLINK, AT_FDCWD, a, AT_FDCWD, NONE, REAL(rmdir)(a)) }
int mkdir(const char *a, mode_t mode) { NAMES(MKDIR, AT_FDCWD, a, AT_FDCWD, NONE, REAL(mkdir)(a, mode)) }
int mkdirat(int f, const char *a, mode_t mode) { NAMES(MKDIR, f, a, AT_FDCWD, NONE, REAL(mkdirat)(f, a, mode)) }

/* ---- calls on a descriptor ---- */

#define ON_FILE(kind, records, made, told) \
    char into[PATH_MAX]; \
    int ruled = any_rule(kind); \
    if (inside || (!ruled && !((records) && record_to >= 0))) return made; \
    inside = 1; \
    const char *full = path_of(file, into); \
    struct rule *rule = ruled ? affected(kind, full) : NULL; \
    FAIL(rule, -1) \
    int recorded = (records) && below_root(full); \
    if (recorded && (kind) == SYNC) record(SYNC_BEGINS, full, NULL, inode_of(file), 0, 0, NULL, 0); \
    __typeof__(made) result = made; \
    if (recorded && result >= 0) { told; } \
    AFTER(rule) \
    int kept = errno; \
    inside = 0; \
    errno = kept; \
    return result;

/* A torn write: half of it reaches the file, and the process is gone. */
#define TORN(call) if (rule && rule->error == KILL_TORN && size > 1) { size /= 2; }
#define WRITING(kind, made, at) \
    char into[PATH_MAX]; \
    int ruled = any_rule(kind); \
    if (inside || file == record_to || (!ruled && record_to < 0)) return made; \
    inside = 1; \
    const char *full = path_of(file, into); \
    struct rule *rule = ruled ? affected(kind, full) : NULL; \
    FAIL(rule, -1) \
    TORN(made) \
    ssize_t result = made; \
    int kept = errno; \
    if (result > 0 && below_root(full)) record(kind, full, NULL, inode_of(file), at, result, data, 0); \
    AFTER(rule) \
    inside = 0; \
    errno = kept; \
    return result;

static int64_t end_of(int file, ssize_t written) {
    struct stat found;
    if (fcntl(file, F_GETFL) & O_APPEND) return fstat(file, &found) ? 0 : found.st_size - written;
    return lseek(file, 0, SEEK_CUR) - written;
}

ssize_t write(int file, const void *data, size_t size) { WRITING(WRITE, REAL(write)(file, data, size), end_of(file, result)) }
ssize_t pwrite(int file, const void *data, size_t size, off_t at) { WRITING(WRITE, REAL(pwrite)(file, data, size, at), at) }
ssize_t pwrite64(int file, const void *data, size_t size, off_t at) { WRITING(WRITE, REAL(pwrite64)(file, data, size, at), at) }

/* Copies within the kernel are recorded as writes of what was copied. */
static ssize_t copied(int to, int from, off_t at_from, off_t at_to, ssize_t size) {
    char into[PATH_MAX], *data;
    if (size <= 0 || inside || record_to < 0) return size;
    inside = 1;
    const char *full = path_of(to, into);
    if (below_root(full) && (data = malloc((size_t)size))) {
        if (REAL(pread)(from, data, (size_t)size, at_from) == size) record(WRITE, full, NULL, inode_of(to), at_to, size, data, 0);
        free(data);
    }
    inside = 0;
    return size;
}
static off_t place(int file, const off_t *at) { return at ? *at : lseek(file, 0, SEEK_CUR); }
ssize_t sendfile(int to, int from, off_t *at, size_t size) {
    off_t first = place(from, at), target = place(to, NULL);
    return copied(to, from, first, target, REAL(sendfile)(to, from, at, size));
}
ssize_t sendfile64(int to, int from, off_t *at, size_t size) {
    off_t first = place(from, at), target = place(to, NULL);
    return copied(to, from, first, target, REAL(sendfile64)(to, from, at, size));
}
ssize_t copy_file_range(int from, off_t *at, int to, off_t *at_to, size_t size, unsigned how) {
    off_t first = place(from, at), target = place(to, at_to);
    return copied(to, from, first, target, REAL(copy_file_range)(from, at, to, at_to, size, how));
}
ssize_t read(int file, void *data, size_t size) { ON_FILE(READ, 0, REAL(read)(file, data, size), ) }
ssize_t pread(int file, void *data, size_t size, off_t at) { ON_FILE(READ, 0, REAL(pread)(file, data, size, at), ) }
ssize_t pread64(int file, void *data, size_t size, off_t at) { ON_FILE(READ, 0, REAL(pread64)(file, data, size, at), ) }
ssize_t preadv(int file, const struct iovec *v, int n, off_t at) { ON_FILE(READ, 0, REAL(preadv)(file, v, n, at), ) }
ssize_t preadv64(int file, const struct iovec *v, int n, off_t at) { ON_FILE(READ, 0, REAL(preadv64)(file, v, n, at), ) }
ssize_t preadv2(int file, const struct iovec *v, int n, off_t at, int how) { ON_FILE(READ, 0, REAL(preadv2)(file, v, n, at, how), ) }
int fsync(int file) { ON_FILE(SYNC, 1, REAL(fsync)(file), record(SYNC, full, NULL, inode_of(file), 0, 0, NULL, 0)) }
int fdatasync(int file) { ON_FILE(SYNC, 1, REAL(fdatasync)(file), record(SYNC, full, NULL, inode_of(file), 0, 0, NULL, 0)) }
int ftruncate(int file, off_t size) { ON_FILE(CUT, 1, REAL(ftruncate)(file, size), record(CUT, full, NULL, inode_of(file), 0, size, NULL, 0)) }
int ftruncate64(int file, off_t size) { ON_FILE(CUT, 1, REAL(ftruncate64)(file, size), record(CUT, full, NULL, inode_of(file), 0, size, NULL, 0)) }
int fallocate(int file, int how, off_t at, off_t size) { ON_FILE(RESERVE, 1, REAL(fallocate)(file, how, at, size), record(RESERVE, full, NULL, inode_of(file), at, size, NULL, 0)) }
int fallocate64(int file, int how, off_t at, off_t size) { ON_FILE(RESERVE, 1, REAL(fallocate64)(file, how, at, size), record(RESERVE, full, NULL, inode_of(file), at, size, NULL, 0)) }

int close(int file) { /* what is reported, the descriptor is closed */
    char into[PATH_MAX];
    if (inside || !any_rule(CLOSE)) return REAL(close)(file);
    inside = 1;
    struct rule *rule = affected(CLOSE, path_of(file, into));
    int result = REAL(close)(file);
    FAIL(rule, -1)
    AFTER(rule)
    inside = 0;
    return result;
}

/* ---- threads and clocks: by the folder in which the process stands ---- */

static struct rule *here(uint32_t call) {
    char folder[PATH_MAX];
    struct rule *rule = NULL;
    if (any_rule(call)) {
        inside = 1;
        rule = affected(call, getcwd(folder, sizeof folder) ? folder : "");
        inside = 0;
    }
    return rule;
}

int pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*run)(void *), void *with) {
    struct rule *rule = here(THREAD);
    return rule && rule->error > 0 ? rule->error : REAL(pthread_create)(thread, how, run, with);
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    int result = REAL(clock_gettime)(clock, time);
    struct rule *rule = clock == CLOCK_REALTIME ? here(CLOCK) : NULL;
    if (rule) time->tv_sec += rule->clock_s;
    return result;
}
