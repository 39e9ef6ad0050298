/*
 * doctor_gpu.c: the GPU that a worker's steps may run on: its name and its driver, or why
 * there is none.
 *
 * kvctl links nothing of CUDA: the driver's library is opened here where there is one, and asked
 * through five calls that have had these forms since its first versions. Nothing is allocated on
 * the device.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "doctor.h"

#define LIBRARY "libcuda.so.1"
#define FIX     "workers with backend \"cuda\" need NVIDIA's driver; \"cpu\" needs nothing"

typedef struct driver {
    int (*init)(unsigned flags);
    int (*version)(int *version_p);
    int (*count)(int *n_p);
    int (*name)(char *name, int name_bytes, int device);
    int (*attribute)(int *value_p, int attribute, int device);
} driver;

#define EXPORTS_DMABUF 124 /* the driver's name for this attribute of a device */

/* A function's address: C has no cast for it. False: it is not there. */
static bool find(void *library, const char *symbol, void *function_pp)
{
    void *at = dlsym(library, symbol);
    memcpy(function_pp, &at, sizeof(at));
    return at != NULL;
}

static bool find_all(void *library, driver *d)
{
    return find(library, "cuInit", &d->init) && find(library, "cuDriverGetVersion", &d->version) &&
           find(library, "cuDeviceGetCount", &d->count) &&
           find(library, "cuDeviceGetName", &d->name) &&
           find(library, "cuDeviceGetAttribute", &d->attribute);
}

static void ask(doctor *d, const driver *cuda)
{
    int version = 0, n = 0, exports = 0, error = cuda->init(0);
    char name[128] = "a GPU";
    if (error == 0)
        error = cuda->count(&n);
    if (error != 0 || n == 0) {
        doctor_report(d, DOCTOR_INFO, "gpu", "none: there is a driver, but it has no device (%d)",
                      error);
        doctor_fix(d, "see what nvidia-smi says");
        return;
    }
    (void)cuda->version(&version);
    (void)cuda->name(name, (int)sizeof(name), 0);
    (void)cuda->attribute(&exports, EXPORTS_DMABUF, 0); /* older drivers do not know it */
    d->gpu = exports != 0 ? DOCTOR_GPU_DMABUF : DOCTOR_GPU_PLAIN;
    doctor_report(d, DOCTOR_OK, "gpu", "%s%s, driver for CUDA %d.%d", name,
                  n > 1 ? " and others" : "", version / 1000, version % 1000 / 10);
#ifndef KVASIR_CUDA
    doctor_fix(d, "this build's workers cannot use it: build with -DKVASIR_CUDA=ON");
#endif
}

void doctor_check_gpu(doctor *d)
{
    driver cuda;
    void *library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        doctor_report(d, DOCTOR_INFO, "gpu", "none: no %s on this machine", LIBRARY);
        doctor_fix(d, "%s", FIX);
        return;
    }
    if (find_all(library, &cuda)) {
        ask(d, &cuda);
    } else {
        doctor_report(d, DOCTOR_INFO, "gpu", "none: %s is not NVIDIA's driver", LIBRARY);
        doctor_fix(d, "%s", FIX);
    }
    (void)dlclose(library);
}
