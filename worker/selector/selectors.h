/*
 * selectors.h: the registered tables, for registry.c.
 */
#ifndef KVW_SELECTORS_H
#define KVW_SELECTORS_H

#include "selector.h"

extern const kvw_selector_ops kvw_selector_esa;
extern const kvw_selector_ops kvw_selector_tokenselect;
extern const kvw_selector_ops kvw_selector_gca;
extern const kvw_selector_ops kvw_selector_hsa;

#endif
